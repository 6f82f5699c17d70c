"""A source in; a cache file out: match, plan, embed into parts, pack; repair."""
