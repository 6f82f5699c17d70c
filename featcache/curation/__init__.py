"""What a cache tells about its images: copies, wrong labels, outliers, groups. Arrays in, rows with reasons out.

finding.py        a row, what is remarkable about it, and why
neighbours.py     the nearest neighbours of every row among all others, exactly
best_so_far.py    the best similarities of each row, as blocks of them come
copies.py         rows whose files hold the same bytes
near_copies.py    rows that show the same picture, edited; groups of copies
pixel_check.py    whether two image files show the same picture, by their pixels
label_errors.py   labels that may be wrong, by heads that have not seen the row and by its neighbours
outliers.py       images unlike their class, and images that belong to no class
overlaps.py       classes that may be one
looks.py          pixels of the rows' own files: how bright, how sharp, how large
quality.py        images too dark, blurred, empty or tiny
honest_score.py   accuracy without leaks and without suspects
audit.py          all of it about one cache, and what could not be looked for
plan.py           what to do with each image, and the table that follows
split.py          train, val and test of a source or cache, groups undivided
split_result.py   what it did, and what could not be had
manifest.py       its table
split_folders.py  its folders of copies or links
"""
