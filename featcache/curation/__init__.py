"""What a cache tells about its images: copies, wrong labels, outliers, groups. Arrays in, rows with reasons out.

finding.py       a row, what is remarkable about it, and why
neighbours.py    the nearest neighbours of every row among all others, exactly
label_errors.py  labels that may be wrong, by heads that have not seen the row and by its neighbours
outliers.py      images unlike their class, and images that belong to no class
overlaps.py      classes that may be one
quality.py       images too dark, blurred, empty or tiny
"""
