"""`python -m hf_longctx`."""

from hf_longctx.cli.main import main

main()
