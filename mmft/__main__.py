"""`python -m mmft` and `accelerate launch -m mmft`."""

from mmft.cli import main

if __name__ == "__main__":
    main()
