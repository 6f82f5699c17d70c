"""Runs, told to programs that keep track of them: ``--log``.

tracker.py         the door: which there are, whether one can be used, and a run told to it, in a process of its own
run.py             what is told of a run: parameters, scores, history, files
to_tensorboard.py  event files, in runs/ beside the model
to_mlflow.py       MLflow: a run with its artefacts
to_wandb.py        Weights & Biases: a run with an artefact
"""
