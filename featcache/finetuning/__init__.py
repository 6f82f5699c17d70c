"""A saved model and images in; a better saved model out.

finetune.py       the command: options checked, the start settled
recipes.py        how to train, and what a run is asked for, as data
recipe_values.py  what the fields of a recipe may be
recipe_files.py   recipes and changes that users write, as TOML
start.py          images with splits, and the model to start from
tune.py           the stages after that: assemble, plan, train, choose
budget.py         how much training fits into a given time
loop.py           epoch after epoch: scores on val, the best of them, checkpoints
pixels.py         decoded images, kept
training_input.py  what is kept of one to train on
network.py        backbone and head as one network: parity, stages, what trains
augment.py        random changes to training images
batches.py        the batches of an epoch, augmented ahead
draw_processes.py  the same by worker processes
trainer.py        the steps of an epoch
average.py        the moving average of weights over them
logits.py         of all images, for scores
micro_batches.py  the gradient of a batch on the cores of a CPU
gpu_steps.py      the same on a CUDA GPU, as a graph
fused.py          a backbone as it trains fastest
convolutions.py   its convolutions, forward and back
onednn.py         convolutions whose gradients oneDNN gets wrong
activations.py    those that no convolution takes over, without copies
attention.py      a transformer's attention on a CPU, forward and back
draws.py          dropout and drop path, by image
checkpoint.py     the folder of unfinished work, resuming
result.py         which weights to keep, whether they are better; report and model folder
"""
