"""What a cache tells about its images: copies, wrong labels, outliers, groups. Arrays in, rows with reasons out.

finding.py     a row, what is remarkable about it, and why
neighbours.py  the nearest neighbours of every row among all others, exactly
"""
