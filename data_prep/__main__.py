"""`python -m data_prep`."""

from data_prep.cli import program

if __name__ == "__main__":
    program()
