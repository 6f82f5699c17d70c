"""What a cache tells about its images, and the page on which people decide what becomes of each of them.

audit.py    the public ``audit`` and ``Audit``
text.py     what was found, as text
folder.py   audit.csv, audit.html and plan.csv in a folder
items.py    findings as what is decided at once: a group of copies, or an image with all that is remarkable about it
columns.py  what the page's script knows: columns, and pictures within a budget
page.py     the page
"""
