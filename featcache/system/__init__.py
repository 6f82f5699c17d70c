"""The process and the disk: what to compute with, how to survive, how to write. Nothing here opens an image or a cache.

- ``runtime_options``: which device and counts may be asked for
- ``device``: device, workers, threads, and why
- ``transfer``: tensors on their way to a GPU and back, while it computes
- ``cuda_graphs``: work on a GPU, captured to be replayed
- ``memory``: how much there is; keeping what was freed
- ``signals``: stop between two steps
- ``supervisor``: a worker, and the process that waits for it
- ``worker_processes``: processes that work beside this one, and memory that both see
- ``distributed``: several processes that train one network (torchrun)
- ``display``: tables, and what a notebook shows
- ``lazy_imports``: torchvision without PyTorch's compiler
- ``addresses``: addresses among paths, and what of them may be shown
- ``path_kinds``: what is on a path
- ``path_advice``: the command that was probably meant
- ``files``: atomic, durable files and folders
- ``workdir``: where unfinished work lies, and its lock
- ``safe_load``: files of ``torch.save`` and JSON that nobody vouches for
"""
