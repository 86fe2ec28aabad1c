"""The embedded target: the text it is made from, its tokenizer, its training, its model card."""
