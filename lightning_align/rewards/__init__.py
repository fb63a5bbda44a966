"""What scores a completion: learned models, Python functions, the playground's gold score, and sums of them."""
