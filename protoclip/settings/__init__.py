"""Every setting and flag of the commands. It knows neither torch nor what a setting does."""
