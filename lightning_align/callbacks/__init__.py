"""Lightning callbacks: progress, export, the guard against NaN, and stopping when a reward is exploited."""
