"""The trainer: talks to the rest of the house through its event stream alone."""
