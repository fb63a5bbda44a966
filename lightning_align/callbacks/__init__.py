"""Lightning callbacks: progress, export, and the guard against NaN."""
