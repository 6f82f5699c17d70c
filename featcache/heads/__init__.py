"""Classifiers on embeddings: arrays in; head and scores out. No file, no image.

head.py            a trained head, and what it takes as features
logreg.py          logistic regression: C and scaling chosen by cross-validation
logreg_path.py     its solver, along a path of C
logreg_on_gpu.py   the same with rows and logits on a GPU
minibatch.py       linear and MLP heads, of features that need not fit in memory
feature_batches.py their mini-batches, from memory or straight from a cache
validation.py      folds that keep copies together; scores corrected for the choice of a setting
confident.py       which labels the probabilities contradict
conformal.py       sets of classes that hold the truth as often as asked
neighbours.py      nearest rows; how unfamiliar a row is
layers.py          a head as PyTorch layers
learning_curve.py  accuracy against the number of training images; what twice as many would be worth
metrics.py         accuracy, log loss, calibration, comparison of two models
"""
