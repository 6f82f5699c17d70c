"""The saved model: fit, load, predict, evaluate, export.

model.py             what it is: saved, loaded, checked
card.py              its README.md, for people and the Hugging Face hub
fit.py               fit-head
predict.py           labels for images or caches
prediction.py        what is said of an image; for pandas
limits.py            what a prediction is worth: sets of classes, nearest training images, doubts
scoring.py           labels and probabilities of labelled ones, rows of which scores are made
evaluate.py          scores on labelled ones
training_rows.py     what training has seen
export.py            one file that runs without featcache
export_candidate.py  what every format shares
as_onnx.py           ONNX
as_safetensors.py    tensors for PyTorch
"""
