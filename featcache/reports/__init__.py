"""What there is, in words, tables and pictures.

elements/             what pages are made of: cards, charts, thumbnails, and the one way to make a page
model_report/         the page about a model, section by section
audit/                the page on which people decide what becomes of each image
source_stats/         what a source of images holds, before any work
trackers/             runs, told to TensorBoard, MLflow or Weights & Biases
pages/                templates, style sheet and scripts
info.py               what a cache or a model holds
backbones.py          backbones: a table to choose from, one network from input to embedding
doctor.py             what this machine can do, how fast it embeds and trains, what limits, what would help
machine.py            facts about machine and installation
throughput.py         rates of decoding, of the backbone and of training, measured; photographs to measure with
figures.py            charts as files, for papers
scores.py             scores as text: intervals, which class is taken for which
tables.py             export of a cache, with predictions and places on a map
predictions_table.py  predictions as CSV or JSON lines
gallery.py            what a gallery shows of predictions: counts of all, some drawn at random
gallery_page.py       the page of it
notebook.py           pages in a notebook
curves.py             the history of a training as a picture
preview.py            what the network sees of images, and what a recipe makes of them
contact_sheet.py      predicted images with both labels, mistakes first
"""
