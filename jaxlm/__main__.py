"""``python -m jaxlm``."""

from jaxlm.cli.main import main

if __name__ == "__main__":
    main()
