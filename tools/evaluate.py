from megamoe.__main__ import main

if __name__ == "__main__":
    main("evaluate")
