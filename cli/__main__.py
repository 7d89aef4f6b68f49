"""`python -m hf_longctx.cli`."""

from hf_longctx.cli.main import main

main()
