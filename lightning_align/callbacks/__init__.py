"""Lightning callbacks: progress, export, the guard against NaN, and the plan before the first step."""
