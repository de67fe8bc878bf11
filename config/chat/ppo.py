"""The same as config/chat/rl.py by PPO: a value head says which reward is to be expected.

    python train.py config/chat/countdown.py
    python train.py config/chat/ppo.py
    python evaluate.py --out_dir=out/chat/ppo

No answer is compared with others to the same problem, so each round asks 512 problems once.
"""

_base = "rl.py"

method = "ppo"
out_dir = "out/chat/ppo"

samples = 1
divide = True
rates = dict(score=6.0)  # the value head is new, and may learn faster
