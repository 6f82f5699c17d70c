"""Name and weights in; embeddings of images out.

choice.py            auto, fast, base, best -> name, with reason, cost and licence
hub.py               are weights here already, does the hub answer; its files
load.py              name and weights -> Backbone
catalog.py           what is known of a backbone by its name: cost, licence, published figures; catalog.csv is what was counted
stages.py            a network from its input to the embedding, in a few rows
from_torchvision.py  torchvision's models
from_timm.py         timm's
from_openclip.py     image towers of open_clip
from_transformers.py vision models of transformers
image_processor.py   what an image processor of transformers does, as a spec
pooling.py           tokens and maps -> one vector; several layers side by side
backbone.py          what a Backbone is; its weights read, hashed, saved
saved.py             the backbone of a saved model
embedder.py          Embedder: a backbone ready to embed
embed.py             the one embedding loop
ring.py              batches filled by many threads, computed by one device
lanes.py             a GPU that takes batch after batch
encoder.py           a backbone made fast
self_check.py        are embeddings still the network's own? Is bf16 good enough?
tracing.py           a network as a graph of calls
folding.py           batch norms folded into convolutions, what follows these done in them
winograd.py          3 x 3 convolutions by a quarter of the multiplications, forward and back
depthwise.py         depthwise convolutions that no GPU has to compile first
fused_tokens.py      linear layers with what follows them, attention, no token in vain
"""
