"""What every text backend shares: patterns, special tokens, input files, vocabulary files, caches. No torch here."""
