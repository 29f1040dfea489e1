"""What the soak stage is made of: a server and its callers in processes of their own, and the judgement.

guard.py       runs a command that must not outlive whoever asked for it, and watches it
server.py      the gateway, or ``vllm serve``: started, watched and always stopped
locustfile.py  what a simulated caller does
load.py        Locust, and what its callers saw
judge.py       intervals -> percentiles, drift, memory slope, and why they will not do; pure
chart.py       all of it over time
"""
