"""What is watched while a model trains; every guard is a value with a state that checkpoints keep."""
