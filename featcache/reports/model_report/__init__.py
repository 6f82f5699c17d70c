"""The page about a model.

report.py         its sections in order; ``report``
subject.py        what a report is about: scored rows, their scores, cards for the page
advice.py         what to do next, in sentences with their figures
confusion.py      the confusion matrix as a table of buttons; scores of each class
calibration.py    what probabilities are worth: reliability, coverage against accuracy
learning.py       how it was trained: choice of C, learning curve, epochs, frozen against fine-tuned
embedding_map.py  map and wall of pictures; ``map``
comparison.py     one model against another; where a model came from
"""
