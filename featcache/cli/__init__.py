"""The command line: parse, call a plain function, print.

app.py      all commands together, exit codes, logging
split.py    split
extract.py  extract
merge.py    merge
audit.py    audit
train.py    fit-head, finetune
predict.py  predict, evaluate
exchange.py export, import
pages.py    report
inspect.py  stats, preview, info, verify, backbones, doctor
demo.py     demo: the whole job on handwritten digits
examples.py examples: files to copy
options.py  options that several commands share
help.py     options in groups
usage.py    what is said about wrong usage
console.py  what is printed: results, messages, progress
"""
