from megamoe.config import cli

if __name__ == "__main__":
    cli.run_command("check_corpus")
