"""Draft modes, one file each; a file's name is the draft's name in ``conf/draft/``."""
