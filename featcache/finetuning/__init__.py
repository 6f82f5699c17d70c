"""A saved model and images in; a better saved model out.

finetune.py    the whole of it, in order
start.py       images and model to start from (LP-FT)
pixels.py      images decoded once
network.py     backbone and head as one network, its stages
trainer.py     the training loop
recipes.py     how to train, as data
augment.py     random changes to training images
checkpoint.py  unfinished work: how it is resumed
compare.py     which weights to keep (WiSE-FT), was it worth it
save.py        the report and the model folder
"""
