"""What prototypes are worth: rules, data, runs and report of the study, and the default run."""
