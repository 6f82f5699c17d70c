"""What there is, in words, tables and pictures.

info.py               what a cache or a model holds
backbones.py          backbones: a table to choose from, one network from input to embedding
doctor.py             what this machine can do, how fast it embeds, what limits, what would help
machine.py            facts about machine and installation
throughput.py         rates of decoding and of the backbone, measured; photographs to measure with
figures.py            charts as files, for papers
stats.py              what a source of images holds, before any work
stats_advice.py       what to do about it, in sentences
stats_text.py         the same as text
stats_page.py         the same as a page, in a folder with its numbers
scores.py             scores as text: intervals, which class is taken for which
predictions_table.py  predictions as CSV or JSON lines
report.py             the page about a model: its sections in order
subject.py            what a report is about: scored rows, their scores, cards for the page
advice.py             what to do next, in sentences with their figures
comparison.py         one model against another; where a model came from
confusion.py          the confusion matrix as a table of buttons; scores of each class
calibration.py        what probabilities are worth: reliability, coverage against accuracy
learning.py           how it was trained: choice of C, learning curve, epochs, frozen against fine-tuned
gallery.py            what a gallery shows of predictions: counts of all, some drawn at random
gallery_page.py       the page of it
notebook.py           pages in a notebook
curves.py             the history of a training as a picture
preview.py            what the network sees of images, and what a recipe makes of them
contact_sheet.py      predicted images with both labels, mistakes first
drawing.py            letters, sizes and files of pictures
page.py               the one way to make a page: templates of pages/, escaped, under a Content-Security-Policy
cards.py              pictures with what is known of them, for pages
charts.py             charts as SVG
thumbnails.py         small pictures within a budget
projection.py         embeddings on a plane: principal components, t-SNE, and how far to trust it
wall.py               an order in which similar pictures are neighbours
embedding_map.py      map and wall of pictures, for pages; ``map``
pictures.py           the image files of rows, found by digest
numbers.py            numbers as people read them
"""
