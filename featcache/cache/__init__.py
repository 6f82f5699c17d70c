"""The HDF5 file of format version 1: written, read, verified. No torch, no image.

format.py       what the file looks like inside: columns, checksums, provenance
write.py        write one, complete or not at all
cache.py        FeatureCache: one open for reading
features.py     rows out of it
copies.py       which rows hold the same image
table.py        its rows as a table: Arrow, pandas
export.py       as a file for other programs: Parquet, NumPy, FAISS, FiftyOne, Label Studio
hdf5_reader.py  HDF5 read byte by byte, for files that nobody vouches for
"""
