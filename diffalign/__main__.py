"""`python -m diffalign`, and `accelerate launch -m diffalign` for several processes."""

from diffalign.cli import main

if __name__ == "__main__":
    main()
