"""The HDF5 file of format version 1: written, read, verified. No torch, no image.

format.py       what the file looks like inside: columns, checksums
write.py        write one, complete or not at all
cache.py        FeatureCache: one open for reading
features.py     rows out of it
provenance.py   how it came about
hdf5_reader.py  HDF5 read byte by byte, for files that nobody vouches for
sparse_file.py  a layout with a hole, in memory
"""
