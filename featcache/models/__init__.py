"""The saved model: fit, load, predict, evaluate, export."""
