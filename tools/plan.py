"""Plan a run on many GPUs: `python tools/plan.py --gpus 1024 --ep_size 8 --ds_config ds_configs/zero2.json`."""

from megamoe.config import cli

if __name__ == "__main__":
    cli.run_command("plan")
