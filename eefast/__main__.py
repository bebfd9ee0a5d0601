"""The words `python -m eefast …` → the same as `eefast …`."""

from eefast_command import main

main()
