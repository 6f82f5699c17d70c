"""A source in; a cache file out.

extract.py    the whole of it, in order
job.py        what it needs once there is something to embed
in_parts.py   extract --part, and merge
listing.py    what the processes that make parts agree on
shares.py     which images are whose
executors.py  who embeds: the contract, and this very process
on_devices.py who embeds: several GPUs of one machine
on_ray.py     who embeds: a Ray cluster
request.py    what is asked for
settings.py   what a cache was made with: it counts where the request is silent
plan.py       what is there, what is left to do
match.py      images to cached rows, by digest
parts.py      finished work of a running extraction: how it is resumed
repair.py     verify --repair
kept.py       embeddings kept by content, for callers that bring images and want arrays
restore.py    damaged columns, from the source
external.py   import: vectors that were made elsewhere
vectors.py    their tables: Parquet, .npz
"""
