"""What a source of images holds, before any work.

stats.py   what is there, in numbers; ``stats``
advice.py  what to do about it, in sentences
text.py    the same as text
page.py    the same as a page, in a folder with its numbers
"""
