"""Arrays in; head and scores out. No file, no image.

head.py         what a head is, whatever trained it
logreg.py       logistic regression, C and scaling chosen (linear probe)
logreg_path.py  its solver
minibatch.py    linear and MLP heads, by mini-batches
layers.py       a head as PyTorch layers
metrics.py      scores
"""
