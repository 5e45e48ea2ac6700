"""How models/emoji_scenes is made, to be read as a course in this order.

corpus          the pictures, their captions, and the bias that is put into them
tokenizer       captions become numbers
common          the loop that every training runs in
text_encoder    numbers become meaning
vae             pictures become small latents, and come back
denoiser        diffusion itself: say which noise was added to a latent
judging         pictures to learn judging from, and the statistics of judging
safety_checker  the service's own check of finished pictures
detector        the judge of evaluation
export          all of it as one folder that diffusers loads
"""
