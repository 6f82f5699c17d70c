"""``python -m featcache``."""

from featcache.cli.app import main

main()
