"""The program deq-ddim: its commands, and what they draw, print and keep. The library needs none of this."""
