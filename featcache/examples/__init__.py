"""Files to copy and change, one for each way in which featcache is run elsewhere; ``featcache examples`` prints them. Each is tried
by ``tests/test_examples.py``.

service.py   a web service that labels images, with FastAPI
Dockerfile   an image of featcache for CPUs
slurm.sh     a large folder embedded by many jobs of a Slurm cluster
kubernetes.yaml  the same by the pods of an Indexed Job
Snakefile    a Snakemake workflow, from photos to scores
dvc.yaml     the same as stages of DVC
"""
