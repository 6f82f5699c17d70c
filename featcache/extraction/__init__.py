"""A source in; a cache file out.

extract.py  the whole of it, in order
request.py  what is asked for
settings.py what a cache was made with: it counts where the request is silent
plan.py     what is there, what is left to do
match.py    images to cached rows, by digest
parts.py    finished work of a running extraction: how it is resumed
repair.py   verify --repair
restore.py  damaged columns, from the source
external.py import: vectors that were made elsewhere
vectors.py  their tables: Parquet, .npz
"""
