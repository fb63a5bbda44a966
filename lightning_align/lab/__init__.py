"""What finished runs say: the true score over KL, where it peaks, and which checkpoint to keep."""
