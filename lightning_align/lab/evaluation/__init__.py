"""What ``evaluate`` measures of policies and reward models, and how sure it is."""
