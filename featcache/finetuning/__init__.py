"""A saved model and images in; a better saved model out.

finetune.py    the command: its stages, and the values that they hand on
job.py         what stays the same through all stages
start.py       images with splits, and the model to start from
pixels.py      decoded images, kept
network.py     backbone and head as one network: parity, stages, what trains
recipes.py     how to train, as data
augment.py     random changes to training images
trainer.py     the steps of an epoch
epochs.py      epoch after epoch: score, remember the best, stop
checkpoint.py  the folder of unfinished work, resuming
compare.py     which weights to keep, and whether they are better
save.py        report and model folder
"""
