"""The facts of the suite `knowledge`: (what is asked about, the answer) by category, or whole questions."""

CAPITALS = """\
France Paris; Germany Berlin; Italy Rome; Spain Madrid; Portugal Lisbon; Poland Warsaw; Austria Vienna;
Hungary Budapest; Greece Athens; Norway Oslo; Sweden Stockholm; Finland Helsinki; Denmark Copenhagen;
Ireland Dublin; Russia Moscow; Turkey Ankara; Egypt Cairo; Kenya Nairobi; Ghana Accra; Nigeria Abuja;
Morocco Rabat; Ethiopia Addis-Ababa; Japan Tokyo; China Beijing; India New-Delhi; Thailand Bangkok;
Vietnam Hanoi; Indonesia Jakarta; Iran Tehran; Iraq Baghdad; Canada Ottawa; Mexico Mexico-City; Cuba Havana;
Peru Lima; Chile Santiago; Argentina Buenos-Aires; Brazil Brasilia; Colombia Bogota; Australia Canberra;
South-Korea Seoul"""
SYMBOLS = """\
hydrogen H; helium He; carbon C; nitrogen N; oxygen O; sodium Na; magnesium Mg; aluminium Al; silicon Si;
phosphorus P; sulfur S; chlorine Cl; potassium K; calcium Ca; iron Fe; copper Cu; zinc Zn; silver Ag; tin Sn;
gold Au; mercury Hg; lead Pb; uranium U; iodine I; nickel Ni"""
AUTHORS = """\
Hamlet William-Shakespeare; Pride-and-Prejudice Jane-Austen; Oliver-Twist Charles-Dickens;
Moby-Dick Herman-Melville; War-and-Peace Leo-Tolstoy; Crime-and-Punishment Fyodor-Dostoevsky;
Don-Quixote Miguel-de-Cervantes; The-Odyssey Homer; The-Divine-Comedy Dante-Alighieri;
Les-Miserables Victor-Hugo; Faust Johann-Wolfgang-von-Goethe; The-Metamorphosis Franz-Kafka;
Frankenstein Mary-Shelley; Dracula Bram-Stoker; Ulysses James-Joyce; Madame-Bovary Gustave-Flaubert;
Candide Voltaire; Treasure-Island Robert-Louis-Stevenson; The-Time-Machine H.-G.-Wells;
Walden Henry-David-Thoreau"""

# Question | right answer | three wrong ones.
SCIENCE = """Which planet is closest to the Sun?|Mercury|Venus|Mars|Jupiter
Which planet is the largest in the solar system?|Jupiter|Saturn|Earth|Neptune
What gas do plants take in for photosynthesis?|carbon dioxide|oxygen|nitrogen|helium
Which organ pumps blood through the human body?|the heart|the liver|the lungs|the stomach
What is the hardest natural mineral?|diamond|quartz|talc|gypsum
What does a thermometer measure?|temperature|pressure|weight|speed
Which force pulls objects towards the Earth?|gravity|friction|magnetism|tension
At what temperature in Celsius does water boil at sea level?|100 degrees|50 degrees|200 degrees|0 degrees
How many legs does a spider have?|eight|six|ten|four
Which animal is a mammal?|a whale|a shark|a trout|a frog
What is the chemical formula of water?|H2O|CO2|NaCl|O3
Which part of a plant takes up water from the soil?|the roots|the leaves|the petals|the seeds
What is the unit of electric current?|the ampere|the volt|the metre|the kilogram
What is the unit of force?|the newton|the joule|the watt|the litre
Which blood cells carry oxygen?|red blood cells|white blood cells|platelets|nerve cells
What is the closest star to the Earth?|the Sun|Sirius|Polaris|Vega
What causes the tides in the sea?|the pull of the Moon|the wind|volcanoes|rain
Which metal is liquid at room temperature?|mercury|iron|copper|gold
What is frozen water called?|ice|steam|dew|fog
Which gas makes up most of the air?|nitrogen|oxygen|argon|hydrogen
What do bees make from nectar?|honey|milk|silk|butter
What is a young frog called?|a tadpole|a calf|a cub|a chick
Which sense uses the ears?|hearing|sight|taste|smell
What is the centre of an atom called?|the nucleus|the shell|the orbit|the crust
Which instrument shows very small things?|a microscope|a telescope|a barometer|a compass"""
EVERYDAY = """How many days are in a leap year?|366|365|364|360
How many minutes are in an hour?|60|100|24|30
Which month comes after April?|May|March|June|July
What do people use an umbrella for?|to keep off the rain|to cut paper|to cook soup|to write letters
What colour do blue and yellow paint make?|green|purple|orange|red
How many sides has a hexagon?|six|five|seven|eight
In which direction does the Sun rise?|in the east|in the west|in the north|in the south
Which season is the coldest?|winter|summer|spring|autumn
What is the opposite of expensive?|cheap|heavy|early|bright
Who repairs teeth?|a dentist|a baker|a pilot|a tailor
Which tool drives a nail into wood?|a hammer|a spoon|a brush|a ladder
How many wheels has a bicycle?|two|three|four|six
Where are books lent to readers?|in a library|in a bakery|in a garage|in a stadium
What is bread mostly made of?|flour|sand|milk powder|rice paper
Which of these is a vegetable?|a carrot|an apple|a cherry|a walnut
How many letters has the English alphabet?|26|24|30|20
Which meal is eaten in the morning?|breakfast|dinner|supper|lunch
What does a red traffic light mean?|stop|go|turn left|speed up
Which animal barks?|a dog|a cat|a cow|a horse
How many centimetres are in a metre?|100|10|1000|60
What is used to measure time?|a clock|a ruler|a scale|a map
Which of these floats on water?|a cork|a stone|an iron nail|a brick
Who flies an aeroplane?|a pilot|a waiter|a farmer|a judge
What is the past tense of "go"?|went|goed|gone away|going
Which of these is worn on the feet?|shoes|gloves|a hat|a scarf"""
