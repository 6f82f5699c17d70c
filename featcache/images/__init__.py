"""A folder or a list in; upright RGB pixels, or a reason why not, out.

source.py       which images a source holds
folders.py      below a folder
tables.py       named by a table or list, also on stdin
metadata.py     labelled by a table inside of their folder
records.py      text of a table: encoding, separators, rows
columns.py      which column holds what
layout.py       what the names of folders mean: splits, classes
splits.py       which of them train, which are held out
groups.py       which belong together
deal.py         how many of each class, group by group, go where
shards.py       in archives: what their folders, neighbours and columns mean
archives.py     bytes of a file inside of an archive
members.py      what is known of such a file
tar.py          what a tar holds
zip.py          what a zip holds, and its bytes
gzipped.py      a gzip file, from anywhere
parquet.py      rows of Parquet with bytes of images; the one door to pyarrow here
home.py         the folder or archive that some probably lie in
locations.py    where bytes lie: patterns, versions, open files
remote.py       objects elsewhere, through fsspec: versions, bytes, patience
readahead.py    an object elsewhere as an open file
read.py         files read: the one loop over them
headers.py      what their headers say
statistics.py   what can be told of them before any network sees them
in_memory.py    PIL images and arrays, as files
fill.py         rows of a GPU's batches, by threads or processes
decode.py       bytes to pixels, or why not; what if the decoder crashes
formats.py      what samples mean, format by format; to RGB
integrity.py    are all pixels there? PNG, TIFF
jpeg.py         the same for JPEG
jpeg_header.py  what a usual one's header says, without Pillow
gpu_jpeg.py     which JPEGs a GPU decodes, and how; the one door to torchcodec
gpu_resize.py   resizes what it decoded, many at a time
heif.py         the same for HEIF, and the one door to its decoder
preprocess.py   resize, crop, normalise
"""
